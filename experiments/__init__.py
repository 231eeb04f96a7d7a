"""What a person runs: each module reproduces one paper's claim and says what it measured."""
