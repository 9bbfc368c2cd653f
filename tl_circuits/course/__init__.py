"""Four graded assignments on the built-in model: starter notebooks, and checks that give points and hints."""
