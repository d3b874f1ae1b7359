"""Parts that go with every test-time adaptation method: losses, sample filters, restoration rules, output heads."""
