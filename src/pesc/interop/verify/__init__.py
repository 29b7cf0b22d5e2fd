"""`pesc verify`: prove that a model's files hold the experts that they promise."""
