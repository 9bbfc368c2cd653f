"""Five graded assignments, four on the built-in model and one on SmolLM2-135M: starter notebooks, checks, points."""
