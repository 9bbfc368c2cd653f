"""What each assignment asks, and how its answers are checked: one module for each assignment."""
