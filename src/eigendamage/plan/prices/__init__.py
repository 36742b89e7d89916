"""What each method says that removing a unit costs, in expected rise of the loss."""
