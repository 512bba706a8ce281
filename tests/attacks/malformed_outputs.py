from attacks.catalogue import Catalogue

CATALOGUE = Catalogue()
