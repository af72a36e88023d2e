"""How weights become integers: to nearest, with error feedback, with fitted zero points."""
