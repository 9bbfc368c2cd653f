"""Find the features and edges that recur in the graphs of many prompts."""
