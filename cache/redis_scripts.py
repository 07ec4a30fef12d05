"""What Redis does in one step for cache/redis_store.py, in Lua; the layout of what it keeps.

A rule is kept as two doubles, `left` and `at`; a counter as its end and its sum; values, notes and
entries of logs as their end and their bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cache.store import BUCKET_KEPT_S, QUOTA_KEPT_S

# Before others: what a key has, of so many bytes at least; false for what is not there or not ours.
_KEPT = """
local function kept_at(key, least_bytes)
  local kept = redis.call('GET', key)
  return kept and #kept >= least_bytes and kept
end
"""

# Rules: KEYS one each; ARGV now, what to do, then each one's full, refill a second, end (-1: none)
# and amount.
# The same arithmetic as cache.memory_store.Level; `left` and `at` are kept as two doubles.
_LIMITS = """
local now, what = tonumber(ARGV[1]), ARGV[2]
local lefts, ats, waits, longest = {}, {}, {}, 0
local function rule(i)
  local a = 4 * i - 1
  return tonumber(ARGV[a]), tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
end
for i, key in ipairs(KEYS) do
  local full, per_s, ends_at, amount = rule(i)
  local kept = kept_at(key, 16)
  local left, at = full, now
  if kept then
    left, at = struct.unpack('<dd', kept)
    local later = math.max(at, now)
    left = math.min(full, left + (later - at) * per_s)
    at = later
  end
  local wait = 0
  if ends_at < 0 then
    local lacking = math.min(amount, full) - left
    if lacking > 0 then wait = per_s > 0 and lacking / per_s or math.huge end
  elseif amount > left then
    wait = amount <= full and math.max(1, ends_at - now) or math.huge
  end
  lefts[i], ats[i], waits[i] = left, at, wait
  longest = math.max(longest, wait)
end
if what == 'take' and longest > 0 then
  local said = {0, string.format('%.17g', longest)}
  for i = 1, #KEYS do
    said[2 * i + 1] = string.format('%.17g', lefts[i])
    said[2 * i + 2] = waits[i] > 0 and 1 or 0
  end
  return said
end
local said = {1}
for i, key in ipairs(KEYS) do
  local full, per_s, ends_at, amount = rule(i)
  local left = lefts[i]
  if what == 'take' then left = left - amount
  elseif what == 'settle' then left = math.min(full, left + amount)
  else left = math.min(left, amount) end
  local kept_s
  if ends_at >= 0 then kept_s = ends_at + QUOTA_KEPT_S - now
  else kept_s = (per_s > 0 and (full - left) / per_s or QUOTA_KEPT_S) + BUCKET_KEPT_S end
  local kept_ms = math.min(math.max(1, math.ceil(1000 * kept_s)), 1e12)
  redis.call('SET', key, struct.pack('<dd', left, ats[i]), 'PX', string.format('%.0f', kept_ms))
  said[i + 1] = string.format('%.17g', left)
end
return said
""".replace("QUOTA_KEPT_S", str(QUOTA_KEPT_S)).replace("BUCKET_KEPT_S", str(BUCKET_KEPT_S))

# KEYS one; ARGV now, has old, old, has new, new with its end, milliseconds.
_SWAP = """
local now = tonumber(ARGV[1])
local kept = kept_at(KEYS[1], 8)
if kept and struct.unpack('<d', kept) <= now then kept = false end
local same
if ARGV[2] == '0' then same = not kept else same = kept and string.sub(kept, 9) == ARGV[3] end
if not same then return 0 end
if ARGV[4] == '0' then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[6]) end
return 1
"""

# KEYS one; ARGV now, amount, end, milliseconds.
_COUNT = """
local kept = kept_at(KEYS[1], 16)
local ends, sum = tonumber(ARGV[3]), 0
if kept then
  local kept_ends, kept_sum = struct.unpack('<dd', kept)
  if tonumber(ARGV[1]) < kept_ends then ends, sum = kept_ends, kept_sum else kept = nil end
end
sum = sum + tonumber(ARGV[2])
local packed = struct.pack('<dd', ends, sum)
if kept then redis.call('SET', KEYS[1], packed, 'KEEPTTL')
else redis.call('SET', KEYS[1], packed, 'PX', ARGV[4]) end
return string.format('%.17g', sum)
"""

# KEYS one; ARGV keep, milliseconds, then entries with their end.
_APPEND = """
for i = 3, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'e', ARGV[i])
end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
"""

# KEYS one; ARGV owner, note with its end, milliseconds.
_POST = """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
"""


@dataclass(frozen=True, slots=True)
class Script:
    """Lua that Redis knows by its digest once it has seen it."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


LIMITS, SWAP, COUNT = (Script.of(_KEPT + text) for text in (_LIMITS, _SWAP, _COUNT))
APPEND, POST = map(Script.of, (_APPEND, _POST))
