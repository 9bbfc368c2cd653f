"""What recurs in the graphs of many prompts."""
