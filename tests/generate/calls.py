"""The calls that the tests of the server make, and what it is told to be."""

LENGTH = 160
QUESTION = [{"role": "user", "content": "Where is the key?"}]
CHAT = {"model": "model", "messages": QUESTION, "max_tokens": 12, "seed": 3}
