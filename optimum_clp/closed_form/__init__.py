"""The layers next to a cut, solved for in closed form: what tuning starts from, and what the search scores cuts with."""
