// The page as text, with links, buttons and fields numbered: {text, controls}. Runs in the page,
// which may lie about itself: whoever reads it bounds it and takes it for a stranger's words.
([maxChars, maxControls]) => {
  const SKIP = new Set(["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE", "IFRAME", "OBJECT", "SVG"]);
  const CONTROLS = "a[href], button, input:not([type=hidden]), select, textarea, " +
    "[role=button], [role=link], [onclick], summary";
  const controls = [null];
  let text = "";
  const squeeze = (words) => (words || "").replace(/\s+/g, " ").trim();
  const describe = (element) => {
    const label = element.getAttribute("aria-label") || element.getAttribute("title");
    switch (element.tagName) {
      case "A": return `link: ${squeeze(element.textContent) || label || ""}`;
      case "SELECT": {
        const options = [...element.options].slice(0, 50).map((option) => squeeze(option.text));
        return `list: ${squeeze(element.selectedOptions[0]?.text)} of ${options.join(", ")}`;
      }
      case "INPUT":
        if (["button", "submit", "reset", "image"].includes(element.type)) {
          return `button: ${element.value || label || element.type}`;
        }
        if (["checkbox", "radio"].includes(element.type)) {
          return `${element.type}: ${element.checked ? "on" : "off"}`;
        }
        return `field: ${element.value || label || element.placeholder || ""}`;
      case "TEXTAREA": return `field: ${element.value || label || element.placeholder || ""}`;
      default: return `button: ${squeeze(element.textContent) || label || ""}`;
    }
  };
  const walk = (node) => {
    if (text.length > maxChars) return;
    if (node.nodeType === Node.TEXT_NODE) {
      text += node.data.replace(/\s+/g, " ");
      return;
    }
    if (node.nodeType !== Node.ELEMENT_NODE || SKIP.has(node.tagName.toUpperCase())) return;
    const style = getComputedStyle(node);
    if (style.display === "none" || style.visibility === "hidden") return;
    if (node.matches(CONTROLS) && controls.length <= maxControls) {
      text += ` [${controls.length} ${describe(node).slice(0, 500)}] `;
      controls.push(node);
      return;
    }
    if (node.tagName === "IMG") text += ` [image: ${squeeze(node.alt)}] `;
    const block = !style.display.startsWith("inline") && style.display !== "contents";
    const cell = style.display === "table-cell";
    if (block && !cell) text += "\n";
    for (const child of node.childNodes) walk(child);
    if (cell) text += " | ";
    else if (block || node.tagName === "BR") text += "\n";
  };
  if (document.body) walk(document.body);
  const lines = text.split("\n").map(squeeze).filter((line) => line);
  return { text: lines.join("\n").slice(0, maxChars), controls };
}
