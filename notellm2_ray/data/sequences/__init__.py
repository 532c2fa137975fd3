"""The recommender's data: users' histories, their blocks, targets and candidates."""
