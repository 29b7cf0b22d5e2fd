"""`pesc verify`: prove that a model's files hold what they promise."""
