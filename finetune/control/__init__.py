"""The dense model beside the sparse one: trained on the same tokens in the same order, and what lies between them."""
