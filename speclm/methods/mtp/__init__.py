"""Multi-token prediction (MTP): layers that come with the target and predict further tokens."""
