"""Fixed pools that worlds draw from; every word is single and belongs to one pool only."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    """
    Ada Alba Amir Anton Astrid Aziz Bela Bruno Carla Chen Clara Dario Dora Edith Elias Emil Erin
    Esme Fatima Felix Flora Gita Greta Hamid Hana Hugo Ida Igor Ines Iris Ivan Jana Jonas Judith
    Kaito Karim Lars Lena Leo Lina Lucia Mara Marek Mina Nadia Nils Nora Olga Omar Oskar Pablo
    Petra Rafael Rosa Ruben Sana Selma Silas Tara Theo Uma Vera Yusuf Zoe
    """
)
COMPANIES = _words(
    """
    Altimex Bluepeak Cordata Deltron Fablix Halcore Inverto Jadewell Kestrix Lumitek Novacorp
    Optiva Quantrel Solvanta Vectrix Zentrio
    """
)
CITIES = _words(
    """
    Arnholm Brezno Dunmore Farsund Glenrock Harwick Istrana Jorvale Lindvik Marsden Norburg
    Pelham Stenbro Tarnow Varberg Yarmouth
    """
)
HOBBIES = _words(
    """
    chess tennis cooking sailing poetry fencing juggling archery knitting karate painting
    running singing skating dancing fishing
    """
)
PRODUCTS = _words("boats clocks engines carpets drones guitars mirrors robots")
LANDMARKS = _words("castle harbour museum cathedral stadium theatre tower zoo")
FILES = ("sales.csv", "stock.csv", "orders.csv")
ITEMS = _words("lamps chairs desks pens rugs cups forks vases")
