"""`zcompile reproduce`: the cost model beside published measurements, measurements on this machine, and what it predicts beyond them."""
