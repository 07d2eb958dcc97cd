"""Files behind URLs: locations, requests for ranges, and read-ahead. Imports fsspec at the first URL."""
