"""What the compiler did, for people: `text` (a graph, one node a line), `dump` (the files), `report` (compile times)."""
