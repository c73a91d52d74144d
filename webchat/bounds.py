"""Every bound of the chat, in one table."""

TITLE_FROM_TEXT = 60
CONTENT_CHARACTERS = 200_000
SYSTEM_CHARACTERS = 32_000
MAX_TOKENS = 1_000_000
TEMPERATURE_MAX = 2.0
MESSAGES_PER_CONVERSATION = 10_000
GENERATIONS_PER_USER = 8
LISTED = 500
QUERY_CHARACTERS = 200
BODY_BYTES = 128 * 1024

FRAME_BYTES = 256 * 1024
FRAMES_PER_SECOND = 20.0
FRAMES_REFUSED = 100
"""A socket that goes on after this many refused frames is closed."""
SOCKETS_PER_USER = 10
FOLLOWED_PER_SOCKET = 64
USER_CHECK_SECONDS = 4.0
"""A person who was disabled or logged out is cut off within five seconds."""
AWAY_SECONDS = 60.0
"""A person seen before is believed this long after the database was last heard of."""
