"""What makes models and data of other libraries inputs of this one; each in a module to import."""
