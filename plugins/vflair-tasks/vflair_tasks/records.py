"""Seeded synthetic records: sentences with a planted name, e-mail address and number.

Nobody real is named: names are combined at random, addresses end in the domains reserved for
examples (RFC 2606) and numbers are random digits.
"""

from __future__ import annotations

import random
from string import Formatter

from attrs import frozen

from vflair_core import Example, Span, TaskError

FIRST_NAMES = """
    Adela Alvar Amina Anton Beatriz Bela Bruno Camille Carlos Chiara Dagmar Dalia Declan Edith Elena
    Emeka Farid Fiona Florian Gita Greta Gustav Hana Harald Hiro Ines Ingrid Ivan Jasmin Jonas Jun
    Kamal Karin Kofi Lars Leila Lucia Magnus Malik Marta Mei Nadia Nils Noor Olga Oscar Paula Petra
    Quentin Rafael Rosa Samir Selma Stefan Tala Tomas Ulla Viktor Wanda Yusuf Zora
""".split()
LAST_NAMES = """
    Abara Albers Anders Baptiste Barros Bianchi Brandt Calder Castro Chen Cohen Dahl Delgado Dubois
    Eriksen Falk Ferrari Fischer Garnier Gomez Haddad Hansen Hayashi Horvat Ibsen Ivanova Jansen
    Kaplan Keller Kimura Kowalski Lang Larsen Lindqvist Lopes Madsen Mbeki Meyer Moreau Nakamura
    Novak Okafor Olsen Ortega Palmer Petrov Quist Ramos Reyes Rossi Sato Schubert Silva Suzuki
    Tanaka Torres Ueda Vargas Weber Yilmaz Zhang
""".split()
ADDRESSES = ("{first}.{last}", "{first}_{last}", "{last}.{first}", "{first}-{last}")
HOSTS = "alder birch cedar delta ember fjord grove harbor island juniper kestrel lagoon".split()
ENDINGS = ("example", "example.com", "example.net", "example.org")
TEMPLATES = (
    "The new lease was signed by {name}, who can be reached at {email} or by phone on {phone}.",
    "Please call {name} on {phone} before noon and send the signed offer to {email} after.",
    "A parcel for {name} waits at the front desk; we wrote to {email} and left word on {phone}.",
    "Our files show that {name} moved in March, keeps the mail {email} and still uses {phone}.",
    "Refund the last invoice to account {account}, held by {name}, and confirm by mail to {email}.",
    "The patient {name} asked for the results by mail to {email}, not by a call to {phone}.",
    "Mail to {email} came back twice, so the clerk rang {phone} and spoke with {name} in person.",
    "Account {account} was opened yesterday for {name} after a check of the address {email}.",
    "Dr. {name} will give the second talk; questions go to {email} or, on the day, to {phone}.",
    "For the spare key ask {name}, phone {phone}, or leave a note at {email} the evening before.",
    "Transfer the deposit from account {account} and tell {name} at {email} once it has arrived.",
    "The bicycle found on Monday belongs to {name}, whose phone is {phone} and mail {email}.",
    "If the alarm goes off, ring {phone} first, then write to {email} and wait for {name}.",
    "Membership of {name} ends in June; a reminder went to {email}, the fee left {account}.",
    "We hired {name} as of today: wages go to account {account}, letters go to {email}.",
    "Reservation for two under the name {name}, confirmed by {email}, late arrivals call {phone}.",
    "The insurer wrote to {email} that the claim of {name} will be paid into account {account}.",
    "Witness {name} left the number {phone} and agreed to receive the transcript at {email}.",
    "Ticket closed: {name} could not log in with {email}, and support called back on {phone}.",
    "The loan on account {account} is overdue, and {name} has not replied from {email}.",
    "In an emergency inform {name}, a neighbour, on {phone}; the landlord only reads {email}.",
    "Subscription renewed for {name}, receipt sent to {email}, charged to account {account}.",
    "The choir is led by {name}; to join, write to {email} or ring {phone} after six o'clock.",
    "Ship the spare part to {name}, announce it to {email}, and bill account {account} for it.",
    "Candidate {name} passed the interview, reads mail at {email} and answers {phone} at lunch.",
    "Lost badge reported by {name} from {email}; security will call {phone} when it turns up.",
    "Standing order from {account} cancelled at the wish of {name}, as written from {email}.",
    "The flat on the third floor is shown by {name}: make a date at {email} or on {phone}.",
    "Two payments reached account {account} by mistake; {name} was asked at {email} to return one.",
    "Teacher {name} sends homework from {email} and takes calls on {phone} on Fridays.",
    "Donor {name} gave again this year from account {account} and wants the receipt at {email}.",
    "The garage repaired the car of {name}; nobody answered {phone}, so a mail went to {email}.",
    "Change of address: letters for {name} now go to {email}, the number {phone} remains the same.",
    "Audit note: account {account} lists {name} as its owner and {email} as its only contact.",
    "The translation was done by {name}, who bills account {account} and answers mail at {email}.",
    "Visitor {name} arrives at nine, carries the phone {phone} and confirmed from {email}.",
)


@frozen
class Record:
    """A sentence, and where in it which string is planted, in the order of the text."""

    text: str
    planted: dict[str, Span]  # "name", "email", and "phone" or "account"

    def __getitem__(self, what: str) -> str:
        start, end = self.planted[what]
        return self.text[start:end]

    @property
    def number(self) -> str:
        """Which of the two numbers it has: ``phone`` or ``account``."""
        return "phone" if "phone" in self.planted else "account"


def planted(count: int, *, seed: int) -> list[Example]:
    """Return `count` records with the spans of what is planted; no name or number comes twice."""
    return [Example(r.text, private=tuple(r.planted.values())) for r in records(count, seed=seed)]


def records(count: int, *, seed: int) -> list[Record]:
    """Return `count` records; no name or number comes twice.

    Raises:
        TaskError: There are not that many names.
    """
    names = [(first, last) for first in FIRST_NAMES for last in LAST_NAMES]
    if count > len(names):
        raise TaskError(
            f"Cannot plant {count} records: each has a name of its own and there are {len(names)} "
            "names. Ask for at most that many records in train and test together."
        )
    rng = random.Random(seed)
    chosen = zip(rng.sample(names, count), rng.sample(range(10**9), count), strict=True)
    return [_record(first, last, number, rng) for (first, last), number in chosen]


def _record(first: str, last: str, number: int, rng: random.Random) -> Record:
    user = rng.choice(ADDRESSES).format(first=first.lower(), last=last.lower())
    digits = f"{number:09d}"
    strings = {
        "name": f"{first} {last}",
        "email": f"{user}@{rng.choice(HOSTS)}.{rng.choice(ENDINGS)}",
        "phone": f"{digits[:3]} {digits[3:6]} {digits[6:]}",
        "account": f"{digits[:4]}-{digits[4:]}",
    }
    text, spans = "", {}
    for words, field, _, _ in Formatter().parse(rng.choice(TEMPLATES)):
        text += words
        if field is not None:
            spans[field] = (len(text), len(text) + len(strings[field]))
            text += strings[field]
    return Record(text, spans)
