"""Scripts that measure, in folders by subject; run them from the root of a checkout."""
