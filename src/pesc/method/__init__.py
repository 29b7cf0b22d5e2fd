"""What a crafted model is: the router, the bank of experts, and the FFN that carries both."""
