"""Published weights by name, and models as folders in Hugging Face's layout."""
