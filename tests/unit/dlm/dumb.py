"""The rules of one resource written a second time, as slowly and plainly as features 1.5 tells them.

Names instead of numbers, dicts instead of classes, everything recomputed. Shares nothing with `corral.dlm`.
"""

ORDER = ["NL", "CR", "CW", "PR", "PW", "EX"]
EXCLUDES = {
    "NL": "",
    "CR": "EX",
    "CW": "PR PW EX",
    "PR": "CW PW EX",
    "PW": "CW PR PW EX",
    "EX": "CR CW PR PW EX",
}
READS = {
    "new": "NL CR CW PR PW EX",
    "NL": "NL CR CW PR PW EX",
    "CR": "CR CW PR PW EX",
    "CW": "CW PR PW EX",
    "PR": "PR PW EX",
    "PW": "EX",
    "EX": "",
}
WRITES = {"PW": "NL CR CW PR PW", "EX": "NL CR CW PR PW EX"}


def clash(one, other):
    return other in EXCLUDES[one].split()


class Dumb:
    def __init__(self):
        self.locks = {}  # id -> lock, in order of creation
        self.granted, self.converting, self.waiting = [], [], []
        self.value, self.valid = None, True
        self.said = []

    # operations: each returns what was said, as (id, what, ...)

    def lock(self, id, mode, flags, block):
        lock = {"id": id, "mode": None, "asks": mode, "flags": flags, "out": set(), "bast": "NL", "block": block}
        self.locks[id] = lock
        if self.may(lock, now=True):
            self.grant(lock, say=True)
        elif "NOQUEUE" in flags:
            if "NOQUEUEBAST" in flags:
                self.tell(self.granted + self.converting, lock)
            self.say(lock, "EAGAIN")
            del self.locks[id]
        else:
            self.put(self.waiting, lock)
            self.tell(self.granted, lock)
        return self.heard()

    def convert(self, id, mode, flags, block):
        lock = self.locks[id]
        lock.update(asks=mode, flags=flags, out=set())
        if block is not None:
            lock["block"] = block
        outcome = self.may(lock, now=True)
        if not outcome and "DEMOTED" in lock["out"]:
            self.pass_conversions()
            outcome = self.fits(lock, now=True)
        if outcome is True:
            self.grant(lock, say=True)
            self.grant_pass()
        elif outcome == "cycle" and "NODLCKWT" not in flags:
            self.say(lock, "EDEADLK")
        elif "NOQUEUE" in flags:
            if "NOQUEUEBAST" in flags:
                self.tell(self.granted + self.converting, lock)
            self.say(lock, "EAGAIN")
        else:
            self.granted.remove(lock)
            self.put(self.converting, lock)
            self.tell(self.granted, lock)
        return self.heard()

    def unlock(self, id, flags, block):
        lock = self.locks.pop(id)
        if block is not None:
            lock["block"] = block
        if lock["mode"] in ("PW", "EX"):
            if "IVVALBLK" in flags:
                self.valid = False
            elif "VALBLK" in flags:
                self.value, self.valid = lock["block"], True
        for queue in (self.granted, self.converting, self.waiting):
            if lock in queue:
                queue.remove(lock)
        if not self.locks:
            self.value = None
        lock["out"] = set()
        self.say(lock, "EUNLOCK")
        self.grant_pass()
        return self.heard()

    def cancel(self, id):
        lock = self.locks[id]
        if lock in self.converting:
            self.converting.remove(lock)
            self.granted.append(lock)
        elif lock in self.waiting:
            self.waiting.remove(lock)
            del self.locks[id]
            if not self.locks:
                self.value = None
        else:
            return []
        lock["out"] = set()
        self.say(lock, "ECANCEL")
        self.grant_pass()
        return self.heard()

    # rules

    def fits(self, lock, now):
        if "EXPEDITE" in lock["flags"]:
            return True
        for other in self.granted + self.converting:
            if other is not lock and clash(other["mode"], lock["asks"]):
                return False
        if lock["mode"] is not None:
            if now:
                return "QUECVT" not in lock["flags"] or not self.converting
            return "NOORDER" in lock["flags"] or self.converting[0] is lock
        if "NOORDER" in lock["flags"]:
            return True
        ahead = self.converting + ([] if now and not self.waiting else self.waiting)
        return not ahead or ahead[0] is lock

    def may(self, lock, now):
        if self.fits(lock, now):
            return True
        if lock["mode"] is not None and "NOQUEUE" not in lock["flags"] and self.cycle(lock):
            if "CONVDEADLK" not in lock["flags"]:
                return "cycle"
            lock["mode"] = "NL"
            lock["out"].add("DEMOTED")
            return False
        asked = lock["asks"]
        for flag, mode in (("ALTPR", "PR"), ("ALTCW", "CW")):
            if flag in lock["flags"] and asked != mode:
                lock["asks"] = mode
                if self.fits(lock, now):
                    lock["out"].add("ALTMODE")
                    return True
                lock["asks"] = asked
                return False
        return False

    def cycle(self, lock):
        here = self.converting.index(lock) if lock in self.converting else len(self.converting)
        for place, other in enumerate(self.converting):
            if other is lock:
                continue
            blocks = clash(lock["mode"], other["asks"])
            blocked = clash(other["mode"], lock["asks"])
            if blocks and (place < here or blocked):
                return True
        return False

    def grant(self, lock, say):
        was = lock["mode"] or "new"
        if lock["asks"] in READS[was].split():
            if "VALBLK" in lock["flags"] and self.value is not None:
                lock["block"] = self.value
                lock["out"] |= set() if self.valid else {"VALNOTVALID"}
        elif lock["asks"] in WRITES.get(was, "").split():
            if "IVVALBLK" in lock["flags"]:
                self.valid = False
            elif "VALBLK" in lock["flags"]:
                self.value, self.valid = lock["block"], True
        elif not self.valid:
            lock["out"].add("VALNOTVALID")
        for queue in (self.granted, self.converting, self.waiting):
            if lock in queue:
                queue.remove(lock)
        lock.update(mode=lock["asks"], bast="NL")
        self.granted.append(lock)
        self.say(lock, "OK")

    def pass_conversions(self):
        restarts = 1
        again = True
        while again:
            again = False
            for lock in list(self.converting):
                demoted = "DEMOTED" in lock["out"]
                outcome = self.may(lock, now=False)
                if outcome is True:
                    self.grant(lock, say=True)
                    again = True
                elif not demoted and "DEMOTED" in lock["out"]:
                    again = again or restarts > 0
                    restarts -= 1
                elif outcome == "cycle" and "NODLCKWT" in lock["flags"] and self.lower(lock["bast"], lock["asks"]):
                    lock["bast"] = lock["asks"]
                    if clash(lock["mode"], lock["asks"]):
                        self.said.append((lock["id"], "bast", lock["asks"]))

    def grant_pass(self):
        self.pass_conversions()
        for lock in list(self.waiting):
            if self.may(lock, now=False) is True:
                self.grant(lock, say=True)
        blocked = [lock["asks"] for lock in self.converting if not self.cycle(lock)]
        blocked += [lock["asks"] for lock in self.waiting]
        if not blocked:
            return
        high = max(blocked, key=ORDER.index)
        for holder in self.granted:
            if holder["mode"] == "PR" and "CW" in blocked:
                told = holder["bast"] != "EX"
            else:
                told = self.lower(holder["bast"], high) and clash(holder["mode"], high)
            if told:
                mode = "CW" if "CW" in blocked and high == "PR" and holder["mode"] == "PR" else high
                self.said.append((holder["id"], "bast", mode))
                holder["bast"] = high

    # leaves

    def lower(self, one, other):
        return ORDER.index(one) < ORDER.index(other)

    def put(self, queue, lock):
        queue.insert(0 if "HEADQUE" in lock["flags"] else len(queue), lock)

    def tell(self, holders, asking):
        for holder in holders:
            if holder is asking or not clash(holder["mode"], asking["asks"]):
                continue
            ends = "EX" if {holder["mode"], asking["asks"]} == {"PR", "CW"} else asking["asks"]
            if self.lower(holder["bast"], ends):
                holder["bast"] = asking["asks"]
                self.said.append((holder["id"], "bast", asking["asks"]))

    def say(self, lock, what):
        self.said.append((lock["id"], what, lock["mode"], frozenset(lock["out"]), lock["block"]))

    def heard(self):
        said, self.said = self.said, []
        return said
