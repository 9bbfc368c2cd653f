"""What features mean: labels from the vocabulary, texts that activate them, and records of both on disk."""
