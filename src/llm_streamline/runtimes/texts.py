"""Twenty short texts in many scripts: what two tokenizers are compared on, and prompts where a model brings none."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "I've been told that she'll come; he'd rather not. WE'RE sure IT'S fine!",
    "In 1969, 3 men flew 384,400 km in 8.5 days; it cost $25,400,000,000.",
    "def add(a: int, b: int = 2) -> int:\n    return a + b  # the sum\n\n\nprint(add(40))",
    '{"id": 17, "name": "café", "tags": ["a", "b"], "ok": true}',
    "   Three spaces before,  two within,\tand a tab.\r\nA line of Windows.   ",
    "https://example.org/a_b-c?x=1&y=%20z#part and mail@example.org",
    "Wer ärgert Übergroße Möwen am Fuß des Straßenrands?",
    "François a mangé la crème brûlée; c'était délicieux, n'est-ce pas\u00a0?",
    "El niño soñó con pingüinos ¿y tú? ¡Qué sorpresa!",
    "Быстрая лиса прыгает через собаку в 2024 году.",
    "Η γρήγορη αλεπού κοιμάται.",
    "الثعلب السريع يقفز فوق الكلب ١٢٣.",
    "השועל המהיר קופץ.",
    "तेज़ भूरी लोमड़ी कूदती है।",
    "敏捷的棕色狐狸跳过了懒狗。它在12点睡觉！",
    "素早い茶色の狐は、怠け者の犬を飛び越える。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다.",
    "Emoji: 🦙 👩\u200d🚀 ✅, dashes – —, quotes “a” ‘b’, …",
    "E = mc², ∑ xᵢ ≤ ∞, a\u0301 (combined), ======= ''''`` ?!?! 1st 2nd 3.14e-10",
)
