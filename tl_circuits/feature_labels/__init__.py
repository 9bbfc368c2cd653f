"""What features mean: by the vocabulary, by texts that activate them, by records on disk."""
