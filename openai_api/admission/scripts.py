"""What runs inside Redis, 6.2 or newer: one script that admits, one that amends. Both go by Redis' clock.

The first key of both holds the epoch: a number that is there as long as nobody emptied Redis. The first
argument comes back as the first element of the answer: an answer can be told from another's.
"""

from __future__ import annotations

import hashlib

_LEVEL = """
local function level_of(key, tick_ms, amount, now)
  local packed = redis.call('GET', key)
  if not packed then return 0 end
  local level, at = struct.unpack('<dd', packed)
  return math.max(0, level - math.max(0, math.floor(now / tick_ms) - at) * amount)
end
local function keep_level(key, tick_ms, amount, now, level)
  level = math.min(level, 9007199254740991)
  if level <= 0 then
    redis.call('DEL', key)
  else
    redis.call('SET', key, struct.pack('<dd', level, math.floor(now / tick_ms)),
      'PX', math.min(math.ceil(level / amount) * tick_ms + 1000, 100000000000))
  end
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

ADMIT = (
    _LEVEL
    + """
-- KEYS: epoch, one per limit. ARGV: number, request id, then five per limit: tick_ms, parts, amount, burst,
-- cost; for parallel requests tick_ms is 0, burst the milliseconds of a slot.
-- Answers {number, epoch, 1 or 0, level...}, with the levels after the debit, or as they stand when refused.
local epoch = redis.call('GET', KEYS[1])
if not epoch then return {tonumber(ARGV[1]), 0} end
local answer = {tonumber(ARGV[1]), tonumber(epoch), 1}
for i = 2, #KEYS do
  local a = i * 5 - 7
  local tick_ms, parts, amount = tonumber(ARGV[a]), tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2])
  local burst, cost = tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4])
  local level, room
  if tick_ms == 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
    level = redis.call('ZCARD', KEYS[i])
    room = level < amount
  else
    level = level_of(KEYS[i], tick_ms, amount, now)
    room = cost == 0 or level + cost * parts <= burst * parts
  end
  if not room then answer[3] = 0 end
  answer[i + 2] = level
end
if answer[3] == 0 then return answer end
for i = 2, #KEYS do
  local a = i * 5 - 7
  local tick_ms, parts, amount = tonumber(ARGV[a]), tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2])
  local burst, cost = tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4])
  if tick_ms == 0 then
    redis.call('ZADD', KEYS[i], now + burst, ARGV[2])
    redis.call('PEXPIRE', KEYS[i], burst)
    answer[i + 2] = answer[i + 2] + 1
  else
    answer[i + 2] = answer[i + 2] + cost * parts
    keep_level(KEYS[i], tick_ms, amount, now, answer[i + 2])
  end
end
return answer
"""
)

AMEND = (
    _LEVEL
    + """
-- KEYS: epoch, one per change. ARGV: number, an epoch to begin if there is none (0: do not), then five per
-- change: what, and four more. Answers {number, epoch}.
for i = 2, #KEYS do
  local a = i * 5 - 7
  local what = ARGV[a]
  if what == 'end' then
    redis.call('ZREM', KEYS[i], ARGV[a + 1])
  elseif what == 'hold' then
    redis.call('ZADD', KEYS[i], now + tonumber(ARGV[a + 2]), ARGV[a + 1])
    redis.call('PEXPIRE', KEYS[i], ARGV[a + 2])
  else
    local tick_ms, parts, amount = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
    local value = tonumber(ARGV[a + 4])
    local level = level_of(KEYS[i], tick_ms, amount, now)
    if what == 'add' then level = level + value * parts else level = math.max(level, value) end
    keep_level(KEYS[i], tick_ms, amount, now, level)
  end
end
if ARGV[2] ~= '0' then redis.call('SET', KEYS[1], ARGV[2], 'NX') end
return {tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or 0)}
"""
)

FIELDS = 5
"""Arguments per limit, and per change."""


def digest_of(script: str) -> str:
    """By which Redis knows a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
