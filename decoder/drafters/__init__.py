"""What proposes candidates. No drafter knows another, and no verifier knows any of them."""
