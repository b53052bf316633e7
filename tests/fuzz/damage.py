"""What chance does to a file or to the words of a command."""
import json

NUMBERS = 0, -1, 1, 2**31 - 1, -2**31, 2**63, 10**30, .5, float('nan'), float('inf')
VALUES = (None, True, '', 'a', 'é', '../x', [], {}, [None], {'a': 1}, *NUMBERS)
WORDS = ('', '-1', '0', '1', 'nan', 'inf', '1e99', '9' * 20, '.5', '--', '=', 'a=b', '=1', 'mask_ratio=', 'é', 'x,y',
         '1,', ',', '--bs', '--set', '--out', '-h1', 'None', 'True')


def flip(data, rng):
    for _ in range(int(rng.integers(1, 9))):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))


def overwrite(data, rng):
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 33))
    data[at:at + n] = rng.bytes(len(data[at:at + n]))


def extremes(data, rng):
    "Fields that hold a length or a count, at their limits."
    at, n = int(rng.integers(len(data))), int(rng.choice([1, 2, 4, 8]))
    data[at:at + n] = bytes([int(rng.choice([0, 1, 0x7f, 0x80, 0xff]))]) * len(data[at:at + n])


def cut(data, rng):
    del data[int(rng.integers(len(data))):]


def drop(data, rng):
    at = int(rng.integers(len(data)))
    del data[at:at + int(rng.integers(1, 65))]


def repeat(data, rng):
    at = int(rng.integers(len(data)))
    data[at:at] = data[at:at + int(rng.integers(1, 65))]


def swap(data, rng):
    a, b = sorted(int(rng.integers(len(data))) for _ in range(2))
    data[a:a + 16], data[b:b + 16] = data[b:b + 16], data[a:a + 16]


BYTES = flip, overwrite, extremes, cut, drop, repeat, swap


def places(value, path=()):
    "Each place in plain data, as the keys that lead to it."
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        yield from places(v, (*path, k))


def change_json(value, rng):
    "Plain data with one place changed or removed."
    found = list(places(value))
    path = found[int(rng.integers(len(found)))]
    new = VALUES[int(rng.integers(len(VALUES)))]
    if not path:
        return new
    parent = value
    for k in path[:-1]:
        parent = parent[k]
    if rng.random() < .3:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return value


def damage(original, rng):
    "A damaged copy of a file's bytes, never the same ones, and how."
    if original[:1] == b'{' and rng.random() < .6:
        changed = json.dumps(change_json(json.loads(original), rng)).encode()
        if changed != original:
            return changed, 'change_json'
    while True:
        data = bytearray(original)
        how = BYTES[int(rng.integers(len(BYTES)))]
        how(data, rng)
        if bytes(data) != original:
            return bytes(data), how.__name__


def damage_words(original, rng):
    "A damaged copy of a command's words, and how."
    words = list(original)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(1, len(words))) if len(words) > 1 else 0
        how = rng.choice(['drop', 'replace', 'insert', 'letters'])
        if how == 'drop' and len(words) > 1:
            del words[at]
        elif how == 'replace' and at:
            words[at] = WORDS[int(rng.integers(len(WORDS)))]
        elif how == 'insert':
            words.insert(at + 1, WORDS[int(rng.integers(len(WORDS)))])
        elif at and words[at]:
            letters = bytearray(words[at].encode())
            letters[int(rng.integers(len(letters)))] = int(rng.integers(32, 127))
            words[at] = letters.decode(errors='replace')
    return words, ' '.join(words)
