"""Built-in real data, generators, and loaders of users' own files, by modality."""
