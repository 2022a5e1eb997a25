"use strict";

MFN.pages.text = () => MFN.html`<${MFN.Heading} title="Text" /><${MFN.NeedsServer} what="Text" />`;
