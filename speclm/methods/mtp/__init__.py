"""Multi-token prediction (MTP): layers that come with the target and guess further tokens."""
