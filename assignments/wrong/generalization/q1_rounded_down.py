# The number of members is rounded down.
# says: v = 0\.05 .*one member, you have 0
def members_needed(v, c, target):
    if target <= c:
        return None
    return int((v - c) / (target - c) + 1e-9)
