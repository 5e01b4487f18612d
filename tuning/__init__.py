"""The search for batch size and accumulation per GPU type. Empty until the search is built."""
