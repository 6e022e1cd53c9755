"""The demo: small pretrained parents, made on the spot, become a sparse vision-language model within minutes."""
