"""Change what a model computes and measure what follows: edits, generation, patching, faithfulness."""
