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


def meet(one, other):
    """Ranges as sets of bytes; None is everything."""
    return one is None or other is None or bool(set(range(one[0], one[1] + 1)) & set(range(other[0], other[1] + 1)))


class Dumb:
    def __init__(self):
        self.ranged = False  # somebody named a range since the resource was last unused
        self.locks = {}  # id -> lock, in order of creation
        self.granted, self.converting, self.waiting = [], [], []
        self.value, self.valid = None, True
        self.said = []

    # operations: each returns what was said, as (id, what, ...)

    def lock(self, id, mode, flags, block, wants=None):
        lock = {"id": id, "mode": None, "asks": mode, "flags": flags, "out": set(), "bast": "NL", "block": block}
        lock.update(range=None, wants=wants)
        self.ranged = self.ranged or wants is not None
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

    def convert(self, id, mode, flags, block, wants=None):
        lock = self.locks[id]
        lock.update(asks=mode, flags=flags, out=set(), wants=wants or lock["range"])
        self.ranged = self.ranged or wants is not None
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
            self.ranged = False
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
            if other is not lock and self.hinders(other, lock):
                return False
        if lock["mode"] is not None:
            if now:
                return "QUECVT" not in lock["flags"] or not self.ahead(self.converting, lock)
            return "NOORDER" in lock["flags"] or not self.ahead(self.converting, lock)
        return "NOORDER" in lock["flags"] or not self.ahead(self.converting + self.waiting, lock)

    def hinders(self, holder, lock):
        return clash(holder["mode"], lock["asks"]) and meet(holder["range"], lock["wants"])

    def ahead(self, queue, lock):
        """Those before it, or all if it is not queued, that want some of the same."""
        before = queue[: queue.index(lock)] if lock in queue else queue
        return [other for other in before if meet(other["wants"], lock["wants"])]

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
        if self.ranged:
            return lock in self.waited_for(lock)
        here = self.converting.index(lock) if lock in self.converting else len(self.converting)
        for place, other in enumerate(self.converting):
            if other is lock:
                continue
            blocks = clash(lock["mode"], other["asks"])
            blocked = clash(other["mode"], lock["asks"])
            if blocks and (place < here or blocked):
                return True
        return False

    def waited_for(self, lock):
        """Everybody for whom a conversion waits, directly or through other conversions."""
        queue = self.converting + [lock] * (lock not in self.converting)
        found, news = [], [lock]
        while news:
            asking = news.pop()
            for other in queue:
                waits = other is not asking and self.hinders(other, asking)
                if (waits or other in self.ahead(queue, asking)) and other not in found:
                    found.append(other)
                    news.append(other)
        return found

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
        lock.update(mode=lock["asks"], range=lock["wants"], bast="NL")
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
        asking = [lock for lock in self.converting if not self.cycle(lock)] + self.waiting
        for holder in self.granted:
            blocked = [lock["asks"] for lock in asking if meet(lock["wants"], holder["range"])]
            if not blocked:
                continue
            high = max(blocked, key=ORDER.index)
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
            if holder is asking or not self.hinders(holder, asking):
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


class DumbSpace:
    """Clients, handles, errors, time and orphans around resources, as plainly. Every node hears of everything at once.

    `heard`: ("done", client, handle, cookie, status, mode, flags, block), ("bast", client, handle, mode) and
    ("slow", client, handle, cookie).
    """

    LOCK = {"NOQUEUE", "VALBLK", "IVVALBLK", "PERSISTENT", "NODLCKWT", "NODLCKBLK", "EXPEDITE", "NOQUEUEBAST"}
    LOCK |= {"HEADQUE", "NOORDER", "ORPHAN", "ALTPR", "ALTCW", "TIMEOUT"}
    CONVERT = (LOCK | {"CONVERT", "QUECVT", "CONVDEADLK"}) - {"EXPEDITE"}
    UNLOCK = {"CANCEL", "VALBLK", "IVVALBLK", "FORCEUNLOCK"}

    def __init__(self, node_of, size, slow):
        self.node_of, self.size, self.slow = node_of, size, slow
        self.now = 0
        self.resources = {}
        self.entries = {}  # number -> what a client knows of its lock
        self.number = 0
        self.orphans = []  # entries, longest orphaned first
        self.heard = []

    # what clients ask

    def lock(self, client, handle, cookie, name, mode, flags, value, timeout, wants):
        wrong = flags - self.LOCK or ("EXPEDITE" in flags and (mode != "NL" or "NOQUEUE" in flags))
        if wrong:
            return self.refuse(client, handle, cookie, "EINVAL")
        if "ORPHAN" in flags:
            return self.adopt(client, handle, cookie, name, mode, flags)
        if self.find(client, handle):
            return self.refuse(client, handle, cookie, "EEXIST")
        self.number += 1
        entry = {"number": self.number, "client": client, "handle": handle, "name": name, "dead": False, "kept": None}
        self.entries[self.number] = entry
        self.begin(entry, "lock", cookie, flags, timeout)
        block = self.pad(value or b"") if "VALBLK" in flags else None
        return self.tell(self.resource(name).lock(self.number, mode, flags, block, wants))

    def convert(self, client, handle, cookie, mode, flags, value, timeout, wants):
        entry = self.find(client, handle)
        if not entry:
            return self.refuse(client, handle, cookie, "ENOENT")
        held = self.resource(entry["name"]).locks[entry["number"]]["mode"]
        rising = {"NL": "CR CW PR PW EX", "CR": "CW PR PW EX", "CW": "PR PW EX", "PR": "CW PW EX", "PW": "EX"}
        if flags - self.CONVERT or {"CONVDEADLK", "NOQUEUE"} <= flags:
            return self.refuse(client, handle, cookie, "EINVAL")
        if entry["pending"]:
            return self.refuse(client, handle, cookie, "EBUSY")
        if "QUECVT" in flags and mode not in rising.get(held, "").split():
            return self.refuse(client, handle, cookie, "EINVAL")
        self.begin(entry, "convert", cookie, flags, timeout)
        block = self.block(entry, flags, value)
        return self.tell(self.resource(entry["name"]).convert(entry["number"], mode, flags, block, wants))

    def unlock(self, client, handle, cookie, flags, value):
        if "CANCEL" in flags:
            return self.cancel(client, handle, cookie, flags)
        entry = self.find(client, handle)
        if not entry:
            return self.refuse(client, handle, cookie, "ENOENT")
        if flags - self.UNLOCK:
            return self.refuse(client, handle, cookie, "EINVAL")
        if entry["pending"] and "FORCEUNLOCK" not in flags:
            return self.refuse(client, handle, cookie, "EBUSY")
        if entry["pending"]:
            self.done(entry, "ECANCEL", None, (), None)
        entry["cookie"] = cookie
        return self.end(entry, flags, self.block(entry, flags, value))

    def cancel(self, client, handle, cookie, flags=frozenset()):
        entry = self.find(client, handle)
        if not entry:
            return self.refuse(client, handle, cookie, "ENOENT")
        if flags - self.UNLOCK or "FORCEUNLOCK" in flags or (entry["cancelled"] and not entry["pending"]):
            return self.refuse(client, handle, cookie, "EINVAL")
        self.refuse(client, handle, cookie, "OK")
        if entry["pending"]:
            entry["cancelled"] = True
            self.tell(self.resource(entry["name"]).cancel(entry["number"]))
        return None

    def gone(self, client):
        left = sorted(self.of(client), key=lambda entry: entry["handle"])
        for entry in left:
            entry["dead"] = True
            if "PERSISTENT" in entry["flags"] and not entry["pending"]:
                self.orphans.append(entry)
        for entry in left:
            if "PERSISTENT" in entry["flags"] and entry["pending"]:
                self.tell(self.resource(entry["name"]).cancel(entry["number"]))
        for entry in left:
            if entry["number"] in self.entries and "PERSISTENT" not in entry["flags"]:
                self.end(entry, set(), None)

    def adopt(self, client, handle, cookie, name, mode, flags):
        if self.find(client, handle):
            return self.refuse(client, handle, cookie, "EEXIST")
        here = [e for e in self.orphans if e["name"] == name and self.node_of(e["client"]) == self.node_of(client)]
        for entry in here:
            lock = self.resource(name).locks[entry["number"]]
            if lock["mode"] == mode:
                self.orphans.remove(entry)
                entry.update(client=client, handle=handle, dead=False)
                self.begin(entry, "lock", cookie, flags, 0)
                self.done(entry, "OK", mode, (), lock["block"])
                if entry["kept"]:
                    self.heard.append(("bast", client, handle, entry["kept"]))
                entry["kept"] = None
                return None
        return self.refuse(client, handle, cookie, "EAGAIN" if here else "ENOENT")

    def purge(self, client, cookie, node, whose):
        for entry in sorted(self.orphans, key=lambda entry: entry["name"]):
            if self.node_of(entry["client"]) == node and whose in (0, entry["client"]):
                self.orphans.remove(entry)
                self.end(entry, set(), None)
        self.refuse(client, 0, cookie, "OK")

    def wait(self, until):
        """Time passes: what waits too long ends, what waits long is told."""
        while True:
            waiting = [entry for entry in self.entries.values() if entry["pending"]]
            late = [(entry["deadline"], 0, entry["number"]) for entry in waiting if entry["deadline"]]
            slow = [(entry["slow"], 1, entry["number"]) for entry in waiting if entry["slow"]]
            due = min(late + slow, default=(until + 1,))
            if due[0] > until:
                break
            self.now, what, number = due
            entry = self.entries[number]
            if what == 0:
                entry["late"] = True
                self.tell(self.resource(entry["name"]).cancel(number))
            else:
                entry["slow"] = 0
                self.heard.append(("slow", entry["client"], entry["handle"], entry["cookie"]))
        self.now = until

    # leaves

    def resource(self, name):
        return self.resources.setdefault(name, Dumb())

    def of(self, client):
        return [entry for entry in self.entries.values() if entry["client"] == client and not entry["dead"]]

    def find(self, client, handle):
        return next((entry for entry in self.of(client) if entry["handle"] == handle), None)

    def begin(self, entry, what, cookie, flags, timeout):
        entry.update(pending=what, cookie=cookie, flags=flags, cancelled=False, late=False)
        entry["deadline"] = self.now + timeout if timeout else 0
        entry["slow"] = self.now + self.slow if "NODLCKWT" not in flags else 0

    def end(self, entry, flags, block):
        entry["pending"] = "unlock"
        self.tell(self.resource(entry["name"]).unlock(entry["number"], flags, block))

    def block(self, entry, flags, value):
        if "VALBLK" not in flags:
            return None
        if value is None and self.resource(entry["name"]).locks[entry["number"]]["block"] is not None:
            return None
        return self.pad(value or b"")

    def pad(self, value):
        return value.ljust(self.size, b"\0")

    def tell(self, said):
        """What a resource said, to the clients; of one that is dead a callback is kept."""
        for number, what, mode, *rest in said:
            entry = self.entries.get(number)
            if entry is None:
                continue  # granted to a dead client, which made it end before all was said
            if what != "bast":
                self.done(entry, "ETIMEDOUT" if what == "ECANCEL" and entry["late"] else what, mode, *rest)
            elif not entry["dead"]:
                self.heard.append(("bast", entry["client"], entry["handle"], mode))
            else:
                entry["kept"] = max(entry["kept"] or "NL", mode, key=ORDER.index)

    def done(self, entry, status, mode, flags, block):
        ended = status == "EUNLOCK" or (entry["pending"] == "lock" and status != "OK")
        if not entry["dead"]:
            self.heard.append(
                ("done", entry["client"], entry["handle"], entry["cookie"], status)
                + ((None, (), None) if ended else (mode, tuple(sorted(flags)), block if status == "OK" else None))
            )
        if ended and entry["pending"] and entry["number"] not in self.resource(entry["name"]).locks:
            self.entries.pop(entry["number"], None)
        entry["pending"] = None
        if entry["dead"] and not ended and "PERSISTENT" in entry["flags"]:
            self.orphans.append(entry)
        elif entry["dead"] and not ended:
            self.end(entry, set(), None)

    def refuse(self, client, handle, cookie, status):
        """The answer that concerns no lock."""
        self.heard.append(("done", client, handle, cookie, status, None, (), None))
