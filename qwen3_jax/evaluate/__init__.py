"""Problems that can be checked, and how many of them a model answers right."""
