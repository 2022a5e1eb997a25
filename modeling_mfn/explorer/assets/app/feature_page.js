"use strict";

MFN.pages.feature = () => MFN.html`<${MFN.Heading} title="Feature" />`;
