"""GRU4Rec and SASRec: the models, their training, the note features they may read, and what they may learn from."""
