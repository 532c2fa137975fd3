"""The systems that embedders and rankers are compared with; adding one is one file and one row of a table."""
