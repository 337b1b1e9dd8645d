"""Mathematics and the optimizer: torch only, no framework."""
