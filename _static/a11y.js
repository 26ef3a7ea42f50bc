// Repairs for the keyboard and for screen readers, on every page.
(function () {
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);

  function name(element, label, role) {
    if (role) element.setAttribute("role", role);
    element.setAttribute("aria-label", label);
  }

  // A name that differs from the visible words cannot be spoken to a voice control.
  function names() {
    each(".search-button-field, details > summary[aria-label]", e => e.removeAttribute("aria-label"));
    each(".theme-switch-button", e => name(e, "Colour theme"));
    each(".sidebar-primary-items__start", e => name(e, "Book", "region"));
    each(".citation-list > .citation", e => e.setAttribute("role", "listitem"));
  }

  // What scrolls must take the focus, or the keyboard cannot reach the rest of it.
  function scrollers() {
    each("pre, .math, mjx-container, .output, .pst-scrollable-table-container, .ck-scroll", e => {
      if (e.scrollWidth > e.clientWidth + 1) e.tabIndex = 0;
    });
  }

  // Solutions are opened by a button inside their title; it says what it opens.
  function folds() {
    each(".toggle-button", button => {
      const title = button.closest(".admonition-title");
      if (title) name(button, "Show or hide: " + title.textContent.trim());
      const box = document.getElementById(button.dataset.target);
      const state = () => button.setAttribute("aria-expanded", !box.classList.contains("toggle-hidden"));
      if (box) new MutationObserver(state).observe(box, { attributeFilter: ["class"] });
    });
  }

  window.addEventListener("load", () => {
    names();
    folds();
    scrollers();
    if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(scrollers);
    new ResizeObserver(scrollers).observe(document.body);
  });
})();
