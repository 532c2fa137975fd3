"""Models of others to compare with: BM25, GRU4Rec, SASRec, and the frozen features that the last two may read."""
