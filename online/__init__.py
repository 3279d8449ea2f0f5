"""What the processes say to each other, and where it is kept. Imports neither `decoder` nor `trainer`, and no torch."""
