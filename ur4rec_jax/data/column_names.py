"""Usual names of columns in users' own tables of interactions and items, and their delimiter."""

import re
from collections.abc import Iterable

_ITEM_IDS = (
  'item itemid iid product productid article articleid movie movieid book bookid track trackid'
  ' song songid sku asin parentasin business businessid'
)
# By role, in lower case without blanks, dots, dashes and underscores.
INTERACTIONS = {
  'user': 'user userid uid customer customerid client clientid member memberid account accountid'
  ' visitor visitorid reviewer reviewerid session sessionid',
  'item': _ITEM_IDS,
  'time': 'time timestamp ts date datetime unixtime unixreviewtime eventtime createdat',
  'rating': 'rating ratings stars score overall',
  'event': '',  # A column of kinds of events counts only where a flag names it.
}
ITEMS = {
  'item_id': f'id {_ITEM_IDS}',
  'title': 'title name itemname itemtitle productname producttitle',
  'description': 'description desc summary plot overview abstract review text',
  'genres': 'genre genres category categories',
  'image': 'image images imagepath imageurl img imgurl imurl picture photo poster',
}
# Counts of pieces, which are negative in rows of returns.
QUANTITIES = 'quantity qty units quantite menge anzahl cantidad aantal 数量'
# Names that count only if no usual name is there.
_ITEM_CODES = (
  'stockcode itemcode productcode articlecode articlenumber productsku itemsku lineitemsku isbn ean'
  ' gtin venue venueid poi poiid video videoid news newsid game gameid artist artistid listingid'
)
_RARER = {
  'user': 'customeruserid userpseudoid anonymousid domainuserid distinctid useremail customeremail'
  ' emailaddress email',
  'item': _ITEM_CODES,
  'item_id': _ITEM_CODES,
  'description': 'itemdescription itemdesc productdescription productdesc',
  'genres': 'itemcategory productcategory',
}
# Names such as ordered_at or purchase_date, which are to times what those are to ids.
_LIKE_CREATED = re.compile(
  '(added|booked|bought|checkedout|click|clicked|created|downloaded|interacted|interaction|invoice'
  '|invoiced|listen|listened|occurred|order|ordered|paid|payment|placed|played|posted|purchase'
  '|purchased|rated|rating|read|rented|review|reviewed|sale|sold|submitted|transaction|used|view'
  '|viewed|visit|visited|watch|watched)(at|on|date|day|time|datetime|timestamp|ts)'
)


def find(role: str, columns: Iterable[str]) -> list[str]:
  """Returns the columns whose names are usual for a role.

  Args:
    role: a key of `INTERACTIONS` or `ITEMS`.
    columns: names of columns.
  """
  columns, usual = list(columns), (INTERACTIONS | ITEMS)[role].split()
  found = [name for name in columns if plain(name) in usual]
  if role == 'time' and not found:
    found = [name for name in columns if _LIKE_CREATED.fullmatch(plain(name))]
  return found or [name for name in columns if plain(name) in _RARER.get(role, '').split()]


def plain(name: str) -> str:
  """Spells a name as the lists of this module do."""
  return re.sub(r'[\s._-]', '', name).lower()


def delimiter_of(header: str, usual: str) -> str:
  """Returns the usual delimiter, or the one that the line with the names of columns has instead."""
  # Where a comma is the decimal point, spreadsheets write .csv files with semicolons.
  others = [character for character in ',;\t|' if character in header]
  return others[0] if usual not in others and len(others) == 1 else usual
