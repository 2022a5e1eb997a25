"use strict";

MFN.pages.why = () => MFN.html`<${MFN.Heading} title="Why" /><${MFN.NeedsServer} what="Why" />`;
