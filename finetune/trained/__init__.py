"""What a run trains, by the names of parts, and how fast each of them learns. No torch here, for help."""
