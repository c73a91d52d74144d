"""`/v1/responses`: a chat completion asked for and answered in the words of OpenAI's newer API, and kept
for whoever goes on from it."""
